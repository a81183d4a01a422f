"""Tests of Beanmeter. What they share: ``live`` (a gateway and a scripted upstream), ``bare`` (HTTP by hand), ``outage``
(a database that is away), ``postgres`` (a server of the tests' own)."""
