"""Who may ask, and how much: API keys, and limits of the callers that have them."""
