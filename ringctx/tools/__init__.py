"""What people run beside the job: benchmarks, evaluations, planner, pictures, doctor."""
