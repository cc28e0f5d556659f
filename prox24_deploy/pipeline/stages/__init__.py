"""The stages of a build: what each depends on, leaves behind, and calls.

The inputs of a stage are one frozen object, and its work sees nothing else. torch and the engines
are imported by the stage that needs them.
"""
