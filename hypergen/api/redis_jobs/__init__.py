"""Jobs in Redis, which all replicas of a fleet share. Needs the package redis (extra `redis`)."""
