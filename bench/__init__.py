"""What Beanmeter costs in time and memory, beside its peers. ``python -m bench`` measures everything; each measure is a file
that can be run alone, such as ``python -m bench.small``. Everything happens on loopback and ends by itself.
"""
