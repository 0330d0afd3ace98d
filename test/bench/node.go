// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

// withNode runs f with a containerd, a gateway and an agent, all started for
// it, and a connection to the agent that stays open, as a long-lived caller's
// does. Usage is sampled as often as by default.
func (rep *report) withNode(f func(*rig.Rig, nodev1.NodeClient) error) (err error) {
	tenants, err := benchTenants()
	if err != nil {
		return err
	}
	// Until a rig is open, which may take as long as another one runs.
	closing := rep.atEnd(func() error { return os.RemoveAll(tenants) })
	r, err := rig.Open(rig.Config{NoNet: true, Interval: "10s", Tenants: tenants})
	if err = errors.Join(err, closing()); err != nil {
		if r != nil {
			err = errors.Join(err, r.Close())
		}
		return err
	}
	closing = rep.atEnd(r.Close)
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nthe agent's log ends with:\n%s", err, r.AgentLog())
		}
		err = errors.Join(err, closing())
	}()
	conn, err := grpc.NewClient("unix://"+r.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return f(r, nodev1.NewNodeClient(conn))
}

// tenantFile has room for every sandbox of the benchmarks. Its policy has the
// size of a real one.
const tenantFile = `kind: Tenant
path: acme
quota:
  cpu: 64
  memory: 8GiB
  pids: 16384
  sandboxes: 256
policy:
  name: bench
  rules:
  - name: api
    action: allow
    to:
    - cidr: 203.0.113.10/32
    - cidr: 2001:db8:113::10/128
    ports: [80/tcp, 443/tcp, 5000-5010/tcp]
  - name: registry
    action: allow
    to:
    - {cidr: 10.20.0.0/16, except: [10.20.9.0/24]}
    ports: [443/tcp, 5000/tcp]
  - name: mail
    action: deny
    to:
    - cidr: 0.0.0.0/0
    - cidr: "::/0"
    ports: [25/tcp]
`

func benchTenants() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "bh-bench-"); err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "acme.yaml"), []byte(tenantFile), 0o600)
}
