"""An OpenAI-compatible endpoint on the engine, and a page that shows who wrote what: `fusionroute serve`.

schema.py      what clients may ask
policies.py    model names: the collection, its members, other weights of the complement
asking.py      a request of the protocol becomes rows of the engine
grammar.py     response formats as masks
tools.py       functions that a model may call, as its chat template has them
scheduler.py   the thread that the engine runs in; joins, leaves, limits
replies.py     what the engine wrote becomes replies of the protocol
metrics.py     figures for Prometheus
guard.py       keys, sizes, slow bodies, cross-origin rules
streams.py     work for a client as long as it is there
describe.py    the server's own description
api.py         the routes
web/           the page
"""
