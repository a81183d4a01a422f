"""Faults on purpose: whatever breaks, the books agree with the bill."""
