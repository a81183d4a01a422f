"""The pages that people look at, asked over sockets and in a real browser."""
