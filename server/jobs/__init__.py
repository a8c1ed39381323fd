"""Jobs: requests whose callers do not wait for them, and where they are stored."""
