"""The frozen backbones, and the one place where a method meets a backbone."""
