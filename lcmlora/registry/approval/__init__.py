"""A person's decision on a version that passed the gate, where `gate.approval` asks for one."""
