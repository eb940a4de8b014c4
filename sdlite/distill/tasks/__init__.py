"""What a stage of a recipe trains, and with which loss: one class for each kind of stage."""
