// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// authority signs certificates.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	a.key = newKey(t)
	a.cert = a.sign(tmpl, tmpl, &a.key.PublicKey)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) sign(tmpl, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// issue makes a certificate that is good for life.
func (a *authority) issue(cn string, dns []string, usage x509.ExtKeyUsage, life time.Duration) tls.Certificate {
	key := newKey(a.t)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn},
		DNSNames: dns, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life)}
	cert := a.sign(tmpl, a.cert, &key.PublicKey)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) node(name string) *tls.Certificate {
	c := a.issue("", []string{name}, x509.ExtKeyUsageClientAuth, time.Hour)
	return &c
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	// As a certificate tool does: a new file under the old name.
	if err := os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func writePair(t testing.TB, dir string, c tls.Certificate) {
	t.Helper()
	writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", c.Certificate[0])
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", der)
}

// tlsGateway starts a gateway on a unix socket and on loopback.
func tlsGateway(t testing.TB) (cfg config.Config, dir string, serverCA, nodeCA *authority) {
	dir = t.TempDir()
	serverCA, nodeCA = newAuthority(t), newAuthority(t)
	writePair(t, dir, serverCA.issue("gateway", nil, x509.ExtKeyUsageServerAuth, time.Hour))
	writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", nodeCA.cert.Raw)
	cfg = testConfig(dir)
	cfg.TLS = config.TLS{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"),
		ClientCAFile: filepath.Join(dir, "ca.pem"), Operators: []string{"billing"}}
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = append(cfg.Listen, config.Address{Network: "tcp", Addr: probe.Addr().String()})
	probe.Close()
	start(t, cfg)
	return cfg, dir, serverCA, nodeCA
}

func dialTLS(t testing.TB, addr string, ca *authority, cert *tls.Certificate) client {
	t.Helper()
	conf := &tls.Config{RootCAs: x509.NewCertPool()}
	conf.RootCAs.AddCert(ca.cert)
	if cert != nil {
		// Shown whether or not the gateway would accept its issuer.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return dialWith(t, addr, credentials.NewTLS(conf))
}

func dialWith(t testing.TB, addr string, creds credentials.TransportCredentials) client {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{usagev1.NewUsageClient(conn), gatewayv1.NewGatewayClient(conn), conn}
}

func TestCertificates(t *testing.T) {
	cfg, _, serverCA, nodeCA := tlsGateway(t)
	addr := cfg.Listen[1].Addr
	issue := func(ca *authority, cn string, usage x509.ExtKeyUsage, life time.Duration) *tls.Certificate {
		c := ca.issue(cn, nil, usage, life)
		return &c
	}
	const hour, client, server = time.Hour, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	tests := map[string]struct {
		cert       *tls.Certificate
		push, read codes.Code
	}{
		"node by dns name":    {nodeCA.node("n1"), codes.OK, codes.PermissionDenied},
		"node by common name": {issue(nodeCA, "n1", client, hour), codes.OK, codes.PermissionDenied},
		"another node":        {nodeCA.node("n2"), codes.PermissionDenied, codes.PermissionDenied},
		"name with a prefix":  {nodeCA.node("n1.example"), codes.PermissionDenied, codes.PermissionDenied},
		"no name":             {issue(nodeCA, "", client, hour), codes.PermissionDenied, codes.PermissionDenied},
		"operator":            {issue(nodeCA, "billing", client, hour), codes.PermissionDenied, codes.OK},
		"no certificate":      {nil, codes.Unavailable, codes.Unavailable},
		"another CA":          {newAuthority(t).node("n1"), codes.Unavailable, codes.Unavailable},
		"the server's CA":     {serverCA.node("n1"), codes.Unavailable, codes.Unavailable},
		"a server's":          {issue(nodeCA, "n1", server, hour), codes.Unavailable, codes.Unavailable},
		"out of date":         {issue(nodeCA, "n1", client, -time.Minute), codes.Unavailable, codes.Unavailable},
	}
	n := gatewaytest.NewNode("n1", 1)
	n.Batch(3)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := dialTLS(t, addr, serverCA, tt.cert)
			_, err := c.push(t.Context(), "n1", n.Sent)
			wantCode(t, err, tt.push, "")
			_, err = c.usage.Watermark(t.Context(), &usagev1.WatermarkRequest{NodeId: "n1"})
			wantCode(t, err, tt.push, "")
			_, err = c.gateway.QueryUsage(t.Context(), &gatewayv1.QueryUsageRequest{})
			wantCode(t, err, tt.read, "")
			_, err = c.gateway.ListNodes(t.Context(), &gatewayv1.ListNodesRequest{})
			wantCode(t, err, tt.read, "")
			stream, err := c.gateway.ListRecords(t.Context(), &gatewayv1.QueryUsageRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			if errors.Is(err, io.EOF) { // no records yet
				err = nil
			}
			wantCode(t, err, tt.read, "")
		})
	}
	_, err := dialWith(t, addr, insecure.NewCredentials()).push(t.Context(), "n1", n.Sent)
	wantCode(t, err, codes.Unavailable, "")
}

// A certificate that ends while its connection lives is no longer good.
func TestCertificateEndsDuringTheStream(t *testing.T) {
	cfg, _, serverCA, nodeCA := tlsGateway(t)
	cert := nodeCA.issue("n1", nil, x509.ExtKeyUsageClientAuth, 2*time.Second)
	c := dialTLS(t, cfg.Listen[1].Addr, serverCA, &cert)
	n := gatewaytest.NewNode("n1", 1)
	if _, err := c.push(t.Context(), "n1", n.Batch(1)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(cert.Leaf.NotAfter) + 50*time.Millisecond)
	_, err := c.push(t.Context(), "n1", n.Batch(1))
	wantCode(t, err, codes.Unauthenticated, "certificate ended on")
}

func TestChangedCertificatesAreUsed(t *testing.T) {
	cfg, dir, serverCA, nodeCA := tlsGateway(t)
	works := func(server, node *authority) bool {
		c := dialTLS(t, cfg.Listen[1].Addr, server, node.node("n1"))
		_, err := c.usage.Watermark(t.Context(), &usagev1.WatermarkRequest{NodeId: "n1"})
		return err == nil
	}
	if !works(serverCA, nodeCA) {
		t.Fatal("the first certificates do not work")
	}
	server2, node2 := newAuthority(t), newAuthority(t)
	writePair(t, dir, server2.issue("gateway", nil, x509.ExtKeyUsageServerAuth, time.Hour))
	writePEM(t, cfg.TLS.ClientCAFile, "CERTIFICATE", node2.cert.Raw)
	if works(server2, nodeCA) {
		t.Error("a node of the old CA is still let in")
	}
	if !works(server2, node2) {
		t.Error("the changed certificates are not used")
	}
	if err := os.WriteFile(cfg.TLS.ClientCAFile, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !works(server2, node2) {
		t.Error("a file that cannot be used stopped the gateway from using the last good one")
	}
	if err := os.Remove(cfg.TLS.CertFile); err != nil {
		t.Fatal(err)
	}
	if !works(server2, node2) {
		t.Error("a missing file stopped the gateway from using the last good one")
	}
}

func TestUnusableCertificatesAtStart(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t)
	cfg := testConfig(dir)
	cfg.TLS = config.TLS{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"), ClientCAFile: filepath.Join(dir, "ca.pem")}
	run := func(want string) {
		t.Helper()
		if err := Run(t.Context(), cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	run("tls.cert_file " + cfg.TLS.CertFile)
	writePair(t, dir, ca.issue("gateway", nil, x509.ExtKeyUsageServerAuth, time.Hour))
	run("tls.client_ca_file: open " + cfg.TLS.ClientCAFile)
	if err := os.WriteFile(cfg.TLS.ClientCAFile, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	run("no PEM certificate")
}
