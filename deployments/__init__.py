"""Ray Serve deployments: replicas that claim and run jobs, callback delivery, upkeep, autoscaling."""
