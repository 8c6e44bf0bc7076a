"""Servers on this machine that give wandb's client what it asks for when an artifact is downloaded, or a run is sent:
a client contract, not W&B."""

import base64
import gzip
import hashlib
import http.server
import json
import re
import threading
import time


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
        time.sleep(s.delay)
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
    delay = 0  # seconds before a file is sent

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


class ReceivingHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self, body=b'{}'):
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        raw = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        return gzip.decompress(raw) if self.headers.get('Content-Encoding') == 'gzip' else raw

    def do_GET(self): self.answer()

    def do_PUT(self):
        self.server.put[self.path.removeprefix('/put/')] = self.body()
        self.answer(b'')

    def do_POST(self):
        s, raw = self.server, self.body()
        if self.path.endswith('/file_stream'):
            run = s.runs.setdefault(self.path.split('/')[-2], {})
            for name, part in (json.loads(raw).get('files') or {}).items():
                lines = run.setdefault(name, [])
                s.offsets.append((name, part['offset'], len(lines)))
                lines[part['offset']:] = part['content']
            return self.answer(b'{"limits": {}}')
        query = json.loads(raw)
        op = re.search(r'(?:query|mutation)\s+(\w+)', query['query'])[1]
        v = query.get('variables') or {}
        s.seen.append((op, v))
        data = s.answer_to(op, v, v.get('input') or {})
        self.answer(
            json.dumps(
                dict(data=data) if data is not None else dict(errors=[dict(message=f'unexpected {op}')])
            ).encode()
        )

    def log_message(self, *args): pass


class Receiver(http.server.ThreadingHTTPServer):
    """What `wandb sync` sends: `runs` {id: {file: lines}}, `put` {path: bytes}, `artifacts` {name: what was asked
    for}, `committed`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), ReceivingHandler)
        self.url, self.seen, self.runs, self.put, self.artifacts, self.committed, self.offsets = (
            f'http://127.0.0.1:{self.server_port}',
            [],
            {},
            {},
            {},
            [],
            [],
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer_to(self, op, v, given):
        "What is answered to an operation of wandb's client."
        method = getattr(self, f'answer_{op}', None)
        return method(v, given) if method else None

    def answer_ServerFeaturesQuery(self, v, given):
        return dict(serverInfo=dict(features=[]))

    def answer_Viewer(self, v, given):
        return dict(viewer=dict(id='u', entity='me', username='me', email='', flags='{}', teams=dict(edges=[])))

    def answer_UpsertBucket(self, v, given):
        project = dict(id='p', name=v['project'], entity=dict(id='e', name='me'))
        bucket = dict(id='b', name=v['name'], displayName=v['displayName'] or v['name'], description='', config='{}',
                      sweepName=None, project=project, historyLineCount=0)
        return dict(upsertBucket=dict(inserted=v['name'] not in self.runs, bucket=bucket))

    def answer_RunResumeStatus(self, v, given):
        return self.resume_status(v)

    def answer_CreateRunFiles(self, v, given):
        files = [dict(name=f, uploadUrl=f"{self.url}/put/{v['run']}/{f}") for f in v['files']]
        return dict(createRunFiles=dict(runID='b', uploadHeaders=[], files=files))

    def answer_CreateArtifact(self, v, given):
        name = given['artifactCollectionName']
        self.artifacts[name] = given
        sequence = dict(latestArtifact=None)
        return dict(createArtifact=dict(artifact=dict(id=name, state='PENDING', artifactSequence=sequence)))

    def answer_CreateArtifactManifest(self, v, given):
        file = dict(id='f', uploadUrl=f"{self.url}/put/{v['artifactID']}/manifest", uploadHeaders=[])
        return dict(createArtifactManifest=dict(artifactManifest=dict(id=v['artifactID'], file=file)))

    def answer_CreateArtifactFiles(self, v, given):
        nodes = []
        for f in given['artifactFiles']:
            url = f"{self.url}/put/{f['artifactID']}/{f['name']}"
            about = dict(storagePath=f['name'], uploadUrl=url, uploadHeaders=[], uploadMultipartUrls=None)
            nodes.append(dict(node=about | dict(artifact=dict(id=f['artifactID']))))
        return dict(createArtifactFiles=dict(files=dict(edges=nodes)))

    def answer_CommitArtifact(self, v, given):
        self.committed.append(v['artifactID'])
        return dict(commitArtifact=dict(artifact=dict(id=v['artifactID'], digest='d')))

    def resume_status(self, v):
        run = self.runs.get(v.get('name'))
        if run is None:
            return dict(model=None)
        history, events = run.get('wandb-history.jsonl', []), run.get('wandb-events.jsonl', [])
        bucket = dict(id='b', name=v['name'], summaryMetrics='{}', displayName=v['name'], logLineCount=0,
                      historyLineCount=len(history), eventsLineCount=len(events), historyTail=json.dumps(history[-1:]),
                      eventsTail=json.dumps(events[-1:]), config='{}', tags=[], wandbConfig='{"t": 1}')
        return dict(model=dict(id='p', name=v['project'], entity=dict(id='e', name='me'), bucket=bucket))
