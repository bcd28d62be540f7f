"""Single ops and layers against others, and against the roofline."""
