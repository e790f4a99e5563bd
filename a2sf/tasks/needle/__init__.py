"""The needle tasks: can a model still find facts in a long text when its cache is pruned, asked once or in turns?"""
