"""Tools over targets: verify, inspect, repair, and exchange with other trainers."""
