"""Pages for people: ``/`` and ``/dashboard/…``, made on the server, readable and usable without script.

A page does nothing by itself: it asks the handlers of the management API (`gpuproxy.control.pages.visit`), so what is
checked, limited, written down and refused there is so here.
"""
