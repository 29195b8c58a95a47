#!/usr/bin/env bash
# RWKV-Infer's README, line by line: what its users have in their scripts, unchanged.
# Run in a folder with models/ and states/; PORT is where the server really listens.
set -eu

# The lines say port 9000: curl is led to the real one, the lines stay as they are.
curl() { command curl --silent --show-error --connect-to "127.0.0.1:9000:127.0.0.1:${PORT:-9000}" "$@"; echo; }

curl http://127.0.0.1:9000/loadmodel -X POST -H "Content-Type: application/json" -d '{"model_filename":"models/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth","model_viewname":"RWKV x060 1B6 Base","model_strategy":""}'
curl http://127.0.0.1:9000/loadmodel -X POST -H "Content-Type: application/json" -d '{"model_filename":"models/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth","model_viewname":"RWKV x060 1B6 Base","model_strategy":"","default_temperature":"1.0", "default_top_p":"0.3", "endtoken":"\\n\\n"}'
curl http://127.0.0.1:9000/loadstatemodel -X POST -H "Content-Type: application/json" -d '{"state_filename":"state.pth","state_viewname":"State Test","default_temperature":"1.0", "default_top_p":"0.3"}'
curl http://127.0.0.1:9000/mrss_loadstatemodel -X POST -H "Content-Type: application/json" -d '{"state_viewname":"MRSS Test", "state_filenames":["states/jp7b-bancho.pth","states/ojousama2.pth","states/secret.pth"], "contain_originalstate":"True", "state_gatingweight":["0.01","0.3","0.4","0.03"],"default_temperature":"1.0", "default_top_p":"0.8"}'
curl http://127.0.0.1:9000/models -X GET
curl http://127.0.0.1:9000/v1/chat/completions -X POST -H "Content-Type: application/json" -d '{"model":"RWKV x060 1B6 Base State Test","messages":[{"role":"user","content":"Hello!"}],"max_tokens":16}'
curl http://127.0.0.1:9000/chat/completions -X POST -H "Content-Type: application/json" -d '{"model":"RWKV x060 1B6 Base MRSS Test","messages":[{"role":"user","content":"Hello!"}],"mrss_gatingweight":["0.1","0.2","0.3","0.4"],"params":{"max_tokens":16,"temperature":0.8},"stream":true}'
curl http://127.0.0.1:9000/mrss_set_gatingweight -X POST -H "Content-Type: application/json" -d '{"state_viewname":"RWKV x060 1B6 Base MRSS Test","state_gatingweight":["0.5","0.5"]}'
curl http://127.0.0.1:9000/v1/completions -X POST -H "Content-Type: application/json" -d '{"model":"RWKV x060 1B6 Base MRSS Test","prompt":"User: Hello!\n\nAssistant:","max_tokens":16}'
curl http://127.0.0.1:9000/removestatemodel -X POST -H "Content-Type: application/json" -d '{"dummy":"dummy"}'
curl http://127.0.0.1:9000/models -X GET
curl http://127.0.0.1:9000/loadmodel -X POST -H "Content-Type: application/json" -d '{"model_filename":"models/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth","model_viewname":"RWKV x060 1B6 Base","model_strategy":"","adapter_filename":"adapters/rwkv-9-bone.pth","adapter_mode":"bone","default_temperature":"1.0", "default_top_p":"0.3", "endtoken":"\\n\\n"}'
curl http://127.0.0.1:9000/removemodel -X POST
curl http://127.0.0.1:9000/healthcheck -X GET
