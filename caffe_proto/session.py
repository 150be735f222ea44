from .runtime import *  # temporary
