"""Ray: joining a cluster, command lines, deadlines, lost processes."""
