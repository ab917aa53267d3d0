"""The edge: settings, HTTP API, metrics, command line and the application builders for Ray Serve."""
