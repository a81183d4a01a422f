"""The admin API, and what tools read of prices and usage, over sockets."""
