"""One static page: a prompt in, a picture out."""
