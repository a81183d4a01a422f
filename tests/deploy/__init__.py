"""What operators install: held against the program itself, and run where it can be."""
