"""A simulation of replicas behind a balancer: latencies, rejections and GPU hours of a day of traffic."""
