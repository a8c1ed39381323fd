"""Requests: from the body of a call to a validated `Request`, with prompts, images and errors."""
