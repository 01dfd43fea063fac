"""The engine: one step from unlabelled batches to a scalar, the teachers, scoring, and the module of all parts."""
