"""A server on this machine that gives wandb's client what it asks for when an artifact is downloaded: a client
contract, not W&B."""
import base64
import hashlib
import http.server
import json
import re
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body, code=200):
        self.send_response(code)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        s = self.server
        s.seen.append(('GET', self.path))
        if self.path == '/healthz':
            return self.answer(b'ok')
        if self.path == '/manifest':
            return self.answer(json.dumps(s.manifest).encode())
        name = self.path.removeprefix('/files/')
        self.answer(s.served[name]) if name in s.served else self.answer(b'', 404)

    def do_POST(self):
        s, raw = self.server, self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path != '/graphql':
            return self.answer(b'', 404)
        query = json.loads(raw)['query']
        op = re.search(r'(?:query|mutation)\s+(\w+)', query)[1]
        s.seen.append((op, json.loads(raw).get('variables')))
        data = s.answers().get(op)
        self.answer(json.dumps(dict(data=data)
                               if data is not None else dict(errors=[dict(message=f'unexpected {op}')])).encode())

    def log_message(self, *args): pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):  # {name: bytes}
        super().__init__(('127.0.0.1', 0), Handler)
        self.url, self.seen, self.served = f'http://127.0.0.1:{self.server_port}', [], dict(files)
        def md5(b): return base64.b64encode(hashlib.md5(b).digest()).decode()
        self.manifest = dict(version=1, storagePolicy='wandb-storage-policy-v1',
                             storagePolicyConfig=dict(storageLayout='V2'),
                             contents={k: dict(digest=md5(v), size=len(v), birthArtifactID='art') for k,
                                       v in files.items()})
        self.size = sum(map(len, files.values()))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answers(self):
        project = dict(id='p', internalId='1', name='proj', entity=dict(name='me'))
        collection = dict(__typename='ArtifactSequence', name='data', project=project)
        artifact = dict(__typename='Artifact', id='art', artifactSequence=collection, versionIndex=0,
                        artifactType=dict(name='dataset'), description=None, metadata='{}', ttlDurationSeconds=-1,
                        ttlIsInherited=False, tags=[], historyStep=None, state='COMMITTED', size=str(self.size),
                        digest='d'*32, commitHash='c', fileCount=len(self.served),
                        createdAt='2024-01-01T00:00:00', updatedAt='2024-01-01T00:00:00', aliases=[])
        member = dict(__typename='ArtifactCollectionMembership', id='m', versionIndex=0,
                      createdAt='2024-01-01T00:00:00',
                      aliases=[dict(__typename='ArtifactAlias', id='a', alias='latest')],
                      artifactCollection=collection, artifact=artifact)
        urls = dict(pageInfo=dict(endCursor=None, hasNextPage=False),
                    edges=[dict(node=dict(id=k, name=k, directUrl=f'{self.url}/files/{k}')) for k in self.served])
        file = dict(directUrl=f'{self.url}/manifest')
        found = dict(artifact=dict(files=urls), files=urls)
        collection = dict(__typename='ArtifactSequence', artifactMembership=found)
        return dict(Viewer=dict(viewer=dict(id='u', entity='me', username='me', email='', flags='{}',
                                            teams=dict(edges=[]))),
                    GetDefaultEntity=dict(viewer=dict(id='u', entity='me')),
                    ServerFeaturesQuery=dict(serverInfo=dict(features=[])),
                    ArtifactMembershipByName=dict(project=dict(artifactCollectionMembership=member)),
                    FetchArtifactManifest=dict(artifact=dict(currentManifest=dict(file=file))),
                    GetArtifactMembershipFileUrls=dict(project=dict(artifactCollection=collection)),
                    GetArtifactFileUrls=dict(artifact=dict(files=urls)))
