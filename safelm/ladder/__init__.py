"""The ladder of data interventions: models through all stages, measured after each."""
