"""What the driver writes for people: metrics, reports, logs."""
