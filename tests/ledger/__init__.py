"""Tests of the ledger: the rules, the books, the teller, and what is read from them."""
