"""The engine's HTTP server: OpenAI routes over any `Backend`, on TCP or a Unix socket."""
