"""Networks: plain torch modules that know nothing of files, data or sampling."""
