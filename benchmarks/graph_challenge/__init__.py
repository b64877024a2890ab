"""The challenge on a CPU beside others, and its files read."""
