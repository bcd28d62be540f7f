"""The commands, a file each: `parser()`, what it takes; `run(given, command)`, what it does."""
