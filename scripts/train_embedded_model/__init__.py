"""Train the tiny text-to-image model that HyperGen carries with it, from nothing, on two CPU cores."""
