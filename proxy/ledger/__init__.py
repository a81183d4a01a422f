"""All money state and all SQL: who may spend, what is held, what was booked.

From the ground up: ``schema`` (tables), ``decisions`` (pure rules), ``engine`` (connections and transactions),
``accounts`` (teams, keys, budgets), ``books`` (one transaction of reservations and bookings), ``reports`` (reading),
``teller`` (the one writer of a process), ``migrate`` (the schema's versions).
"""
