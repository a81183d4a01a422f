"""What Beanmeter is made of, for those who have to know: a bill of materials, and the licences in it."""
