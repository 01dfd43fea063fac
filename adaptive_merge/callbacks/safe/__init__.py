"""What keeps a run from being lost or wrong: preemption, ranks, random states, faults."""
