"""The web page: one HTML file, one style sheet, and ES modules with one concern each; no build step."""
