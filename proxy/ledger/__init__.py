"""All money state and all SQL: who may spend, what is held, what was booked.

From the ground up: ``schema`` (tables), ``decisions`` (pure rules), ``engine`` (connections, transactions and threads),
``marks`` (facts about the database itself), ``history`` (what earlier charges mean for a decision), ``books`` (one transaction
of reservations and bookings), ``accounts`` (teams, keys, budgets, limits, audit), ``reviews`` (what an operator says of a
charge), ``reports`` (reading), ``pages`` (listings page by page), ``usage`` (sums by day), ``overviews`` (what pages show),
``refused`` (how often requests were), ``sessions`` (who is signed in to the pages), ``declared`` (what a file says there
should be), ``journal`` (outcomes on local disk), ``teller`` (the one writer of a process), ``sweep`` (what nobody is
left to end), ``migrate`` (the schema's versions).
"""
