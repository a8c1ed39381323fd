"""The faces of the server over HTTP."""
