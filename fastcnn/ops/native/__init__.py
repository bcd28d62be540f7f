"""Building the native library: its sources, compilers, architectures and key."""
