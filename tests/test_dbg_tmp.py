import dbg
from test_huggingface import *
