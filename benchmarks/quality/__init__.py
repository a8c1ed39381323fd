"""What each position of `cache` costs in quality, of the demo model."""
