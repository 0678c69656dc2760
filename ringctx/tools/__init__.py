"""What people run beside the job: benchmarks, planner, pictures, doctor."""
