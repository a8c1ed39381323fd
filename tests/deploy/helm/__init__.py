"""The Helm chart as Helm renders it."""
