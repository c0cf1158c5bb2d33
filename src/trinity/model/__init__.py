"""Floor 2: the AFMoE architecture on one device. Read transformer.py first."""
