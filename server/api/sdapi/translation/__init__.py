"""From bodies of this API to requests: names, bounds, and fields that have no counterpart."""
