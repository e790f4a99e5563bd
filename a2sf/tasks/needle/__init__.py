"""The needle task: can a model still find a fact in a long text when its cache is pruned?"""
