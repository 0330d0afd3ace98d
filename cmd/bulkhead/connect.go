// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/spf13/pflag"
)

// dialError is why the last connection was not made.
type dialError struct {
	to  peer
	err error
}

// peer is who we talk to.
type peer struct {
	name string // agent or gateway
	addr string // path of the socket, or host:port
	unix bool
}

func (p peer) String() string { return p.name + " at " + p.addr }

func (c *cli) dialAgent() (*grpc.ClientConn, error) {
	return c.dial(peer{"agent", c.socket, true}, insecure.NewCredentials())
}

func (c *cli) dial(to peer, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	c.to = to
	network, target := "tcp", "passthrough:///"+to.addr
	if to.unix {
		network, target = "unix", "passthrough:///localhost"
	}
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, to.addr)
		if err != nil {
			c.dialErr.Store(&dialError{to, err})
			return nil, err
		}
		c.dialErr.Store(nil)
		c.dials.Add(1)
		return conn, nil
	}
	quick := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second}
	return grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithContextDialer(dialer),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
}

// gatewayFlags say how to reach a gateway.
type gatewayFlags struct{ addr, ca, cert, key string }

func (g *gatewayFlags) add(f *pflag.FlagSet) {
	f.StringVar(&g.addr, "gateway", "", "ask this gateway: host:port over TLS, or unix:///path")
	f.StringVar(&g.ca, "ca", "", "certificate authority of the gateway, PEM (default: the system's)")
	f.StringVar(&g.cert, "cert", "", "client certificate, PEM")
	f.StringVar(&g.key, "key", "", "key of the client certificate, PEM")
}

func (g *gatewayFlags) check() error {
	if (g.cert == "") != (g.key == "") {
		return usagef("--cert and --key go together")
	}
	if g.addr == "" && g.ca+g.cert+g.key != "" {
		return usagef("--ca, --cert and --key are for --gateway, which is missing")
	}
	if strings.HasPrefix(g.addr, "unix:") && g.ca+g.cert+g.key != "" {
		return usagef("--ca, --cert and --key are for TLS; %s is a unix socket", g.addr)
	}
	return nil
}

func (c *cli) dialGateway(g gatewayFlags) (*grpc.ClientConn, error) {
	if path, ok := strings.CutPrefix(g.addr, "unix:"); ok {
		return c.dial(peer{"gateway", strings.TrimPrefix(path, "//"), true}, insecure.NewCredentials())
	}
	if _, _, err := net.SplitHostPort(g.addr); err != nil {
		return nil, usagef("--gateway: %q is neither host:port nor unix:///path", g.addr)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS13}
	if g.ca != "" {
		pem, err := os.ReadFile(g.ca)
		if err != nil {
			return nil, fmt.Errorf("--ca: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--ca: %s holds no PEM certificate", g.ca)
		}
	}
	if g.cert != "" {
		pair, err := tls.LoadX509KeyPair(g.cert, g.key)
		if err != nil {
			return nil, fmt.Errorf("--cert, --key: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	to := peer{"gateway", g.addr, false}
	return c.dial(to, &handshaker{credentials.NewTLS(conf), c, to})
}

// handshaker remembers why a TLS handshake was not made, which gRPC tells only
// in the text of an error.
type handshaker struct {
	credentials.TransportCredentials
	c  *cli
	to peer
}

func (h *handshaker) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tlsConn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if err != nil {
		h.c.dialErr.Store(&dialError{h.to, err})
	}
	return tlsConn, info, err
}

func (h *handshaker) Clone() credentials.TransportCredentials {
	return &handshaker{h.TransportCredentials.Clone(), h.c, h.to}
}

// patience is how long a command that waits does so for an agent that went
// away. systemd restarts one in seconds.
const patience = 2 * time.Minute

// outlast makes call again while the agent is away, if it was there before.
// call takes up where its last attempt ended. what runs on meanwhile is named
// in the notice.
func (c *cli) outlast(ctx context.Context, notice func(string), call func() error) error {
	var lost time.Time
	var dials int64
	for {
		err := call()
		if !c.away(ctx, err) {
			return err
		}
		if now := c.dials.Load(); lost.IsZero() || now != dials {
			lost, dials = time.Now(), now
			notice("the agent went away; waiting for it to come back")
		}
		if time.Since(lost) > patience {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// away says whether err means that an agent which was there is not any more.
func (c *cli) away(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil || c.dials.Load() == 0 {
		return false
	}
	var se interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &se) {
		return false
	}
	code := se.GRPCStatus().Code()
	return code == codes.Unavailable || code == codes.Canceled
}
