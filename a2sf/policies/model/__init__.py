"""What a policy may see of the model: rotary embedding, projection after the attention, and softmax."""
